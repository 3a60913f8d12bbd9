"""The service: releases behind HTTP, and the streams of cameras, on Ray Serve."""

"""What every room rests on: errors and events. Imports nothing of the package."""

"""Algorithm 1: fine-tune, measure what moved, choose what to keep, fine-tune that alone. Only `pipeline` knows Ray."""

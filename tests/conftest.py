"""One thread a process: forked ranks must not inherit a thread pool, and two cores are soon full."""

import torch

torch.set_num_threads(1)

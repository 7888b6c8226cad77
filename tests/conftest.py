import torch

# the machine's cores are shared with whatever else runs; the tests are small
torch.set_num_threads(2)

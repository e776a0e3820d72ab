"""A run in a process that is going to be killed; imported beforehand, so that it starts at once."""

import gensim.models  # noqa: F401
import matplotlib.figure  # noqa: F401
import nltk  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.stats  # noqa: F401
import torch
import torch._dynamo  # any optimizer imports it

from fastsiam.training.run import train


def run(config):
    # its parent may have had threads, which a fork does not copy
    torch.set_num_threads(1)
    train(config)

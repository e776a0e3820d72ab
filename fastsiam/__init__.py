"""fastsiam: Siamese LSTM text similarity (MaLSTM), fast.

Importing it loads torch alone; triton, gensim, nltk and scipy are loaded by what first needs them.
"""

from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseGRU, SiameseLSTM

__version__ = "0.1.0"
__all__ = ["SiameseGRU", "SiameseLSTM", "TextSiamese"]

"""Text in, integers out: tokens, pairs of sentences, word vectors, ids and batches.

Third parties are imported by the functions that need them, not by this package.
"""

"""Text in, integers out: tokens, pairs of sentences, word vectors, ids and batches.

nltk and gensim are imported by the functions that need them, not by this package.
"""

"""From files of scored sentence pairs to a run folder with a trained model."""

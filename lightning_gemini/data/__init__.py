"""The position in the training data, so that a replaced rank reads the batch its predecessor read."""

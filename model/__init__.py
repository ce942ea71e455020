"""The mathematics: language models, objectives, decoding. Takes tensors and plain values, never a config."""

"""The base model: where it is, how it is loaded, quantised and adapted."""

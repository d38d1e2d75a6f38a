"""What others write, read into our form: the hub, pickled weights, GPTQ and AWQ."""

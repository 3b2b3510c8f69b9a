"""One model from several checkpoints of it, each quantized in its own way.

`mapping_file` is the `mixed_precision` file, `compressed_modules` holds weights as their
checkpoints do, `loader` puts them into a model.
"""

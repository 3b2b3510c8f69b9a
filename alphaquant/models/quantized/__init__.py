"""Checkpoints that other tools quantized, read weight by weight in the form they are stored in.

`compressed` says what a form is, `word_forms`, `byte_forms` and `ct_forms` are the forms of GPTQ
and AWQ, of fp8 and int8, and of compressed-tensors; `stated` reads which form a checkpoint says
its matrices have, and `foreign_files` finds their tensors and compares shapes and dtypes before
any is read.
"""

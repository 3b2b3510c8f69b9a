"""The column loops of GPTQ and of coordinate descent, for each kind of device."""

"""What a format costs: Fisher costs, errors, spectra, gradients, and the store that keeps them."""

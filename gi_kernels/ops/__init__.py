"""One folder per operator: public function, reference definition, kernels, declaration."""

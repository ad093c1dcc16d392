"""The bench: orderbus beside its peers, interleaved in one run, with everything counted afterwards. See bench/README.md."""

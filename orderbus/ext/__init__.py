"""orderbus inside other people's frameworks: one module for each, which needs that framework and the extra of its name."""

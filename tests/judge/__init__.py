"""A plugin that runs the tests of other packages with our callbacks."""

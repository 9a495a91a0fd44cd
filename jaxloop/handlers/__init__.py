"""The built-in handlers, one idea a file, made from `Loop.handle` and `Loop.observe` alone."""

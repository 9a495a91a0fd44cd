"""The vocabulary of jaxloop: types, events, filters, states, batches and arrays."""

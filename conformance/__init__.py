"""Is an implementation of the ops the one that is specified? `pytest conformance --impl some.module` answers."""

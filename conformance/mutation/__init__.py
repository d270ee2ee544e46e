"""Mutation of the product: changes to one statement, tests that should notice, and processes that try them.

`operators` makes the mutants of a file, `selection` names the tests of a file, `worker` runs tests in a copy of the tree, and
`campaign` hands mutants to workers and writes down what became of each. `conformance.mutate` is the command.
"""

"""Laws of the graph: shapes, causality, gradients, votes, state and audit of the model that the op sets share."""

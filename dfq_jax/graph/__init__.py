"""The network as data: operators, graph, evaluator, queries, rewrites, blocks."""

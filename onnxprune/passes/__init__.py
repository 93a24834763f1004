"""Graph -> graph, one pass a file or folder; `harness.run_pass` is the only way to run one."""

"""The phases of `python -m benchmarks.gpu`, each run in a process of its own.

report       what a phase hands back, and the table of all phases
material     models of random weights in real shapes, and the questions; written once for both sides
work         useful operations of a step
measuring    clocks, batch search, the figures of a run
environment  versions, the GEMM rate, attention backends
checks       losses, gradients and answers that must agree
runs         whole runs by the command line: resume, QLoRA, the demo
training     our training steps, and one of them profiled
peers        those of TRL and transformers
answers      evaluation, ours and transformers'
"""

"""Self-improvement of a language model: sample it, have a judge label the samples, train on the pairs, evaluate."""

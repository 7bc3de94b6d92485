"""What noise in training does to models of real data: ``python -m benchmarks.evidence`` trains, measures and reports."""

"""What the passes share that win back accuracy around int8: samples, part-by-part runs, layers as matrices, gains."""

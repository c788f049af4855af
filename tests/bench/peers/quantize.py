"""llama_model_quantize of llama-cpp-python: SOURCE TARGET MIX [IMATRIX]."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench_quality import column_weights
from stock import quantize

source, target, mix, *imatrix = sys.argv[1:]
weights = column_weights(Path(source), Path(imatrix[0])) if imatrix else None
quantize(Path(source), Path(target), mix, weights=weights, pure=False)

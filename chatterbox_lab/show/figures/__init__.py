"""One style for every figure, readable in black and white, with what it was measured on inside the file.

`style` has the look and the saving, the other modules draw by topic; all names are reached as ``figures.NAME``.
"""

from .chunks import SHARE_COLORS, buffers, context_heat_map, latency_front, rtf_shares, window_costs
from .ladders import chunk_costs, s3gen_rungs, t3_rung_parts, t3_rungs, t3_token_times
from .layers import MODE_STYLES, PART_COLORS, layer_heat_map, over_length, step_parts
from .living import STREAMS, WAY_COLORS, decode_costs, left_by_calls, real_time
from .predictions import predictions
from .published import published_rtfs
from .result import stream_bars
from .seams import seam_close_up, trials_board
from .speech import alignment_path, errors_by_sentences, guarded, time_errors
from .style import log_scale, origin, provenance, save, set_style, show
from .training import training_curves

__all__ = [
    "MODE_STYLES",
    "PART_COLORS",
    "SHARE_COLORS",
    "STREAMS",
    "WAY_COLORS",
    "alignment_path",
    "buffers",
    "chunk_costs",
    "context_heat_map",
    "decode_costs",
    "errors_by_sentences",
    "guarded",
    "latency_front",
    "layer_heat_map",
    "left_by_calls",
    "log_scale",
    "origin",
    "over_length",
    "predictions",
    "provenance",
    "published_rtfs",
    "real_time",
    "rtf_shares",
    "s3gen_rungs",
    "save",
    "seam_close_up",
    "set_style",
    "show",
    "step_parts",
    "stream_bars",
    "t3_rung_parts",
    "t3_rungs",
    "t3_token_times",
    "time_errors",
    "training_curves",
    "trials_board",
    "window_costs",
]

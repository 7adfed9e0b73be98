"""From full weights to a folder that plain Transformers loads, reloaded in another process and compared before it counts."""

from scaletrain.export.classifier import export_classifier
from scaletrain.export.masked import FilledMask, export, fill_masks, probe_logits
from scaletrain.export.proof import MARKER, TOLERANCE, ExportReport

__all__ = ["MARKER", "TOLERANCE", "ExportReport", "FilledMask", "export", "export_classifier", "fill_masks", "probe_logits"]

"""AState: how weights travel from training to generation."""

from asystem.state.transport import TensorPlace, WeightPayload, export_weights, import_weights

__all__ = ["TensorPlace", "WeightPayload", "export_weights", "import_weights"]

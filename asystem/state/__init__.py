"""AState: how new weights get from training to generation."""

from asystem.state.transport import WeightPayload, export_weights, import_weights

__all__ = ["WeightPayload", "export_weights", "import_weights"]

"""The paper's tables and figures from runs on disk."""

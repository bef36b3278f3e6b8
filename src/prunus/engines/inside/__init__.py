"""What every process of an engine, and what it starts, finds to import; run by the engine's Python, without prunus."""

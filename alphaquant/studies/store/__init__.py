"""Where a study is kept: output folder, Optuna storage, measured scores."""

"""Self-contained HTML pages: the evaluation report and the gallery of predictions, with their pictures."""

"""What people look at: report.html, report.md, plots, notes, tables."""

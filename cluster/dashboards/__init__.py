"""The Grafana dashboard of the program's metrics, made from the table of metrics."""

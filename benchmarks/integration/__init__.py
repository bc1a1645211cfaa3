"""What a merged model can be used for: its class, other sizes, files, generation, exporters (`docs/integration.md`)."""

"""Saving a merged model: as a folder, as an ExportedProgram, as an ONNX file."""

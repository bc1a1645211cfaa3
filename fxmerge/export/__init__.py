"""Saves a merged model: as a folder, as an ExportedProgram, as an ONNX file, or in the user's own class.

source     the source code of a merged model
own_class  the merged weights in the user's own class
folded     the tensors of that class from which others are computed
check      what is written, compared with the merged model
program    ExportedProgram, .pt2 and ONNX files
save       a merged model as a folder, and a folder as a model
"""

"""Pictures of a network and its merge groups: a record of boxes and arrows, and the formats that show it.

records      a picture as boxes, arrows and frames
build        an analysis or a merge as a picture
frames       the modules that boxes are nested in, and the overview of a large network
curve        a curve as SVG
group_panel  the details of one group
formats      a picture as DOT, SVG, Mermaid, or JSON for Model Explorer
page         a picture and its groups as one HTML file
"""

"""The benchmark behind tools/bench: fusemig, its peers and the limit of the machine, side by side in one run.

    __main__    the command line: which rows, how often, where the results go
    settings    what the run was asked to do
    measure     samples, series, goals, and the loop that alternates the sides
    report      Markdown and JSON;  chart  SVG;  versions  what was measured
    stage       directories, programs, mounts and namespaces of one row, removed in every case
    program     one program: started, bounded in time, its CPU seconds and peak memory
    images      disk images and the comparison of two of them
    qmp, nbd    small clients;  fio  one job and its figures
    load        a guest that writes 4 KiB blocks;  paced  a guest that follows its disk;  raw_copy  the limit
    subject     fusemig;  exporters  who serves a file;  copiers  who copies an image
    rows_*      the rows of the table

A copy counts only after the destination was compared byte for byte; a side whose program is missing or fails is named
with the reason and not counted.
"""

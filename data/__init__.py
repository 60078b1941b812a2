"""What goes in, and the people: data sets, their file formats, and who ranks."""

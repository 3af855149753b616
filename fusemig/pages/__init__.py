"""HTML pages that need nothing but themselves: no other file, no other host, no build step."""

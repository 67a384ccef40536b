"""What any server process needs: sockets, allowed hosts, signals, background threads, orphaned children."""

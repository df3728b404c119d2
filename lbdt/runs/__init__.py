"""What every run needs: files and folders that others share, processes and devices, and names of the Hub."""

"""What `lbdt app` shows, without the page: pictures as they emerge, methods beside each other, what an eraser knows."""

"""`prefuse report`: runs read from their folders (`read`), curves made small (`series`), one HTML file (`write`)."""

// Rescind-gateway checks the requests of gateways that embed nothing.
package main

func main() { panic("skeleton") }
